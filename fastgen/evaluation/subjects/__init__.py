"""What is measured: a student, a teacher, any diffusers pipeline, or a folder of pictures that somebody has drawn already."""

from __future__ import annotations

from fastgen.evaluation.subjects.base import Subject

__all__ = ["Subject"]
