"""Adapters into a model's own weights and out of them again, one tensor at a time."""

from lorasurgery.surgery.apply.engine import apply
from lorasurgery.surgery.apply.inputs import check_model, read_source
from lorasurgery.surgery.apply.options import ApplyOptions
from lorasurgery.surgery.apply.report import ApplyReport
from lorasurgery.surgery.apply.source import Source

__all__ = ["ApplyOptions", "ApplyReport", "Source", "apply", "check_model", "read_source"]
