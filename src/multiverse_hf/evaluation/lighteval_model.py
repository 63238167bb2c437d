"""Former path of ``lighteval/model.py``."""

from multiverse_hf.evaluation.lighteval.model import MultiverseLightevalModel as MultiverseLightevalModel
