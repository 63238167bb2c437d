"""Trainers and callbacks that the recipes share."""
