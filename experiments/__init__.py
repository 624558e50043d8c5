"""Experiments that measure quantjax: one file per question, over shared data, models and loop."""
