"""Which files a path of the command line means, and tables that fit the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import NAMINGS, name_pattern
from lorasurgery.cli.app import app
from lorasurgery.cli.columns import Column, Screen, screen, show_pairs, show_table, wrapped
from lorasurgery.cli.files import ADAPTERS, MODELS, Found, expanded, found_in, means_several
from lorasurgery.layouts import near
from tests.applied import Base
from tests.edges import run
from tests.headers import FLUX, hollow, lora

SD15 = Path(__file__).parent / "fixtures" / "producers" / "diffusers_sd15.safetensors"
PLAIN = Screen(40, 25, colours=False, terminal=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.safetensors",
        "a.pt",
        "notes.txt",
        "model.gguf",
        ".hidden.safetensors",
        "sub/c.safetensors",
        "out/d.safetensors",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "peft" / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path, target_is_directory=True)
    return tmp_path


def names(found: list[Found]) -> list[str]:
    return [one.relative.as_posix() for one in found]


def test_a_folder_is_searched(tree: Path) -> None:
    everything = ["a.pt", "b.safetensors", "model.gguf", "out/d.safetensors", "peft", "sub/c.safetensors"]
    assert names(list(found_in(tree, MODELS))) == everything
    assert [path.relative_to(tree).as_posix() for path in expanded(tree)] == everything
    assert names(list(found_in(tree, ADAPTERS, results=tree / "out"))) == ["a.pt", "b.safetensors", "peft", "sub/c.safetensors"]
    files = names(list(found_in(tree, frozenset({".safetensors"}), peft=False)))
    assert files == ["b.safetensors", "out/d.safetensors", "peft/adapter_model.safetensors", "sub/c.safetensors"]


def test_a_glob_means_its_matches(tree: Path) -> None:
    assert names(list(found_in(tree / "*.safetensors", ADAPTERS))) == ["b.safetensors"]
    assert names(list(found_in(tree / "*.txt", ADAPTERS))) == ["notes.txt"], "a suffix that is named counts"
    assert names(list(found_in(tree / "[ab]*", ADAPTERS))) == ["a.pt", "b.safetensors"]
    assert names(list(found_in(tree / "p*", ADAPTERS))) == ["peft"]
    assert names(list(found_in(tree / "s*", ADAPTERS))) == ["c.safetensors"]
    assert list(found_in(tree / "z*", ADAPTERS)) == []


def test_what_is_named_is_taken(tree: Path) -> None:
    for name in ("notes.txt", "none.safetensors", "peft"):
        assert list(found_in(tree / name, ADAPTERS)) == [Found(tree / name, (tree / name).relative_to(tree))]
        assert not means_several(tree / name)
    assert means_several(tree)
    assert means_several(tree / "*.pt")
    assert means_several(tree / "peft", peft=False)


@pytest.mark.parametrize("command", [["inspect"], ["check", "--for", "comfyui"], ["meta", "verify"]])
def test_a_folder_with_one_file_and_a_glob_give_lines(command: list[str], tmp_path: Path) -> None:
    """One object a line for whatever may be several, whichever command it is."""
    hollow(tmp_path / "one.safetensors", lora(FLUX))
    for path in (tmp_path, tmp_path / "*.safetensors"):
        done = CliRunner().invoke(app, [*command, str(path), "--json"])
        assert done.exit_code == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1


# tables ---------------------------------------------------------------------------------------------------------------------


def test_wrapping() -> None:
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("a " + "x" * 20, 8) == ["a", "xxxxxxxx", "xxxxxxxx", "xxxx"]
    assert wrapped("日本語の名前", 6) == ["日本語", "の名前"], "East Asian characters take two columns"
    assert wrapped("", 5) == [""]


def test_tables_fit(capsys: pytest.CaptureFixture[str]) -> None:
    columns = (Column("name", wraps=True), Column("n", right=True))
    show_table(PLAIN, columns, [("short", "1"), ("a name that is longer than the screen is wide", "12345")], "title")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "title",
        "name                                   n",
        "short                                  1",
        "a name that is longer than the     12345",
        "screen is wide",
    ]
    assert max(map(len, lines)) <= PLAIN.width


def test_a_column_that_would_be_too_narrow_has_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(PLAIN, (Column("name", wraps=True), Column("a"), Column("b")), [("n" * 30, "a" * 15, "b" * 15)])
    name, rest = capsys.readouterr().out.splitlines()[2:]
    assert (name, rest) == ("n" * 30, f"  {'a' * 15}  {'b' * 15}")


def test_pairs_and_colours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    show_pairs(PLAIN._replace(colours=True), [("what", "words \x1b[2J" * 4, "33")])
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out
    assert out.startswith("\x1b[33mwhat\x1b[0m  \x1b[33mwords ")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "77")
    assert (screen().colours, screen().width) == (True, 77)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS")
    assert (screen().colours, screen().width) == (False, 120)


# the cheap look at a file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "apply", "compare"])
def test_commands_for_single_files_do_not_advise_an_output_folder(tmp_path: Path, command: str) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    model = Base.make().save(tmp_path / "model.safetensors")
    words: dict[str, list[object]] = {
        "merge": [folder, "--dry-run"],
        "apply": [model, folder, "--dry-run"],
        "compare": [folder, SD15],
    }
    outcome = run(command, *words[command])
    assert outcome.code in (1, 2)
    assert "loras: this is a folder" in outcome.err
    assert outcome.err.strip().endswith("Try: a file inside it, or a PEFT folder with adapter_config.json")


def test_nothing_that_fits_is_passed_over() -> None:
    """Every module of every table is within the bounds by which tables are left out unexpanded."""
    for arch in architectures().values():
        for naming in NAMINGS:
            stems = {name: arch.module_shape(spans) for name, spans in arch.namings[naming].items()}
            most = {own.architecture: own.most for own in near.near(stems)} if stems else {arch: 0}
            assert most[arch] == len(stems), (arch.key, naming)
        assert {name_pattern(alias.format(i=0)) for alias, _ in arch.aliases} <= near._patterns(arch).keys()
