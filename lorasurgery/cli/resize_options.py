"""The arguments and options of ``lorasurgery resize``, one a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

from typer import Argument, Option

# typer evaluates these on Python 3.10 too, so they stay Optional
Text = Optional[str]  # noqa: UP045
Words = Optional[list[str]]  # noqa: UP045
Number = Optional[int]  # noqa: UP045
Real = Optional[float]  # noqa: UP045
File = Optional[Path]  # noqa: UP045
Files = Optional[list[Path]]  # noqa: UP045

# fmt: off
Paths = Annotated[Files, Argument(metavar="IN... [OUT]", help="Input files or folders, and the output file unless --out or --out-dir is given.", show_default=False)]
Given = Annotated[File, Option("--input", "-i", help="The input.", show_default=False)]
Out = Annotated[File, Option("--out", "-o", "--output", help="The output file (a folder for peft).", show_default=False)]
OutDir = Annotated[File, Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False)]

# what decides the ranks
Rank = Annotated[Words, Option("--rank", "-r", help='The new rank N of linear layers (the most, where something else decides), or "MODULES:N" (or "MODULES=N"): blocks or a component of the model ("double=0-18:16", "mid:8") or a regular expression ("attn:8"), looked for in names in the file and in the model; the first that fits holds. "blocks=N,N,..." has one for each block, as sd-scripts\' block_dims; "double=N,N,..." for each block of a run. 0 leaves out. Repeatable.', show_default=False)]
ConvRank = Annotated[Words, Option("--conv-rank", help="The same for convolutions with a kernel. Default: --rank.", show_default=False)]
PointwiseRank = Annotated[Number, Option("--pointwise-rank", help="Of 1x1 convolutions. Default: --rank.", show_default=False)]
Policy = Annotated[Text, Option("--policy", help="sv_ratio, sv_cumulative, sv_fro, energy (share of the squared norm), threshold (smallest singular value), knee, error (largest relative error) or params (share of the parameters).", show_default=False)]
Param = Annotated[Real, Option("--param", help="The policy's number.", show_default=False)]
Size = Annotated[Text, Option("--size", help="The largest size of the file, e.g. 40MiB, 800KiB, 40MB: spent where it counts most.", show_default=False)]
Recipe = Annotated[Text, Option("--recipe", help='As resize_lora: "fro_ckpt=1,thr=-3.5".', show_default=False)]
Compat = Annotated[Text, Option("--compat", help="Count as another tool does: kohya (sd-scripts' policies in float32; of large matrices twice the largest rank is looked at) or kj (KJNodes, which keeps one more than asked for).", show_default=False)]
MinRank = Annotated[int, Option("--min-rank", help="0: leave out modules of which the policy keeps nothing.")]
Grow = Annotated[bool, Option("--grow", help="Allow more than the old rank, padded with zeros.")]
Uniform = Annotated[bool, Option("--uniform", help="Pad with zeros to one rank, for readers that want that.")]

# what is cut
Base = Annotated[File, Option("--base", help="The base model, a checkpoint or a pipeline's folder: for recipes that look at it, for DoRA, and for names no table knows.", show_default=False)]
Arch = Annotated[Text, Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)]
Include = Annotated[Words, Option("--include", help="Only these modules, named as for --rank: blocks, a component or a regular expression. Repeatable.", show_default=False)]
Exclude = Annotated[Words, Option("--exclude", help="Leave these modules as they are. Repeatable.", show_default=False)]
TextEncoders = Annotated[bool, Option("--te", help="Resize text encoders, too.")]
Full = Annotated[bool, Option("--full", help="Compress full differences into LoRA.")]
As = Annotated[Text, Option("--as", help="lora: turn LoHa and LoKr into LoRA.", show_default=False)]
Dora = Annotated[str, Option("--dora", help="refuse; with --base: recompute the magnitude, or fold it into a plain LoRA.")]

# how it is written
Alpha = Annotated[str, Option("--alpha", help="keep-ratio (alpha / rank stays), rank (alpha is the rank) or a number. The effect is the same.")]
Factors = Annotated[str, Option("--factors", help="balanced, or kohya: all of the strength in up, as sd-scripts writes it.")]
Target = Annotated[Text, Option("--target", "-t", help="Layout to write, as for convert. Default: the input's own.", show_default=False)]
Dtype = Annotated[str, Option("--dtype", help="keep, fp32, fp16 or bf16.")]
Strict = Annotated[bool, Option("--strict", help="Fail when any key of the input would be left out.")]
Force = Annotated[bool, Option("--force", help="Replace existing outputs.")]

# how it runs
Workers = Annotated[Number, Option("--workers", help="Threads. Default: one for each core, at most 8.", show_default=False)]
Device = Annotated[Text, Option("--device", help="A torch device (cuda, cuda:1, cpu) for the decompositions of LoRAs. Default: numpy on the threads, which needs no torch. Beside sd-scripts' options it is accepted, and not needed.", show_default=False)]
DryRun = Annotated[bool, Option("--dry-run", help="Write nothing, and plan: size against error for several ranks. Neither an output nor a rank has to be named.")]
Plan = Annotated[Text, Option("--plan", help="Ranks of the plan, e.g. 2,6,12. Default: 4,8,16,32,64 up to the file's own.", show_default=False)]
Verbose = Annotated[bool, Option("--verbose", help="A line for every module.")]
Json = Annotated[bool, Option("--json", help="Print the report as JSON on stdout.")]

# sd-scripts' spellings
NewRank = Annotated[Number, Option("--new_rank", help="sd-scripts' --rank; 4 where its command line says nothing.", show_default=False)]
NewConvRank = Annotated[Number, Option("--new_conv_rank", help="sd-scripts' rank of all convolutions, 1x1 ones too.", show_default=False)]
DynamicMethod = Annotated[Text, Option("--dynamic_method", help="sd-scripts' --policy.", show_default=False)]
DynamicParam = Annotated[Real, Option("--dynamic_param", help="sd-scripts' --param.", show_default=False)]
Model = Annotated[File, Option("--model", help="sd-scripts' input.", show_default=False)]
SaveTo = Annotated[File, Option("--save_to", help="sd-scripts' output.", show_default=False)]
SavePrecision = Annotated[Text, Option("--save_precision", help="sd-scripts' --dtype: float, fp16 or bf16; without it the dtype stays.", show_default=False)]
Iterations = Annotated[Number, Option("--svd_lowrank_niter", min=0, help="sd-scripts' iterations on large matrices, which ours does not need; 0 lets --compat kohya look at every singular value, as it does there.", show_default=False)]
# fmt: on
