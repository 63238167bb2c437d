"""Former path of :mod:`multiverse_hf.evaluation.lighteval.tasks`."""

from multiverse_hf.evaluation.lighteval.tasks import TASKS_TABLE as TASKS_TABLE
