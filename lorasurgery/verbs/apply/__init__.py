"""Adapters into a model's own weights and out of them again, one tensor at a time."""

from lorasurgery.operations.onto.inputs import check_model, read_source
from lorasurgery.operations.onto.options import ApplyOptions
from lorasurgery.operations.onto.source import Source
from lorasurgery.verbs.apply.engine import apply
from lorasurgery.verbs.apply.report import ApplyReport

__all__ = ["ApplyOptions", "ApplyReport", "Source", "apply", "check_model", "read_source"]
