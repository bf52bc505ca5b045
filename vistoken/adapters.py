"""Hosts, one file per model family: how to recognise a model, read a signal and place a change."""

from vistoken._folders import open_folder

open_folder(globals())
