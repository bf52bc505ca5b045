"""Measurements: the scene data set, evaluation protocols, accuracy scoreboards and benchmarks."""

from vistoken._folders import open_folder

open_folder(globals())
