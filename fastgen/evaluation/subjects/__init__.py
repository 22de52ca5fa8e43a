"""What is measured: a student, a teacher, any diffusers pipeline, or a folder of pictures that somebody has drawn already."""

from __future__ import annotations

from fastgen.evaluation.subjects.base import Subject
from fastgen.evaluation.subjects.found import Wanted, is_student, subject_of
from fastgen.evaluation.subjects.generated import teacher_subject
from fastgen.evaluation.subjects.stock_call import Asked

__all__ = ["Asked", "Subject", "Wanted", "is_student", "subject_of", "teacher_subject"]
