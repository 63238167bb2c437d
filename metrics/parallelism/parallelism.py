"""# parallel of answers, for the ``evaluate`` library: ``evaluate.load("metrics/parallelism")``."""

import datasets
import evaluate

from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.evaluation.metrics import is_well_formed, measure_ids, parallel_rate
from multiverse_hf.modeling.tags import TagSet

_DESCRIPTION = """\
# parallel (Multiverse, arXiv 2506.09991): tokens of an answer over its length, the critical path. 1 where nothing is
written at the same time. With it the length, the tokens, the share of answers that parse and the share that fork."""
_KWARGS_DESCRIPTION = """
Args:
    predictions: answers as the model wrote them, control tags included, without their end tokens.
    tokenizer: whose tokens are counted: a transformers tokenizer that has the tags, or its folder or repository.
Returns:
    parallelism, length, tokens: means over answers. well_formed, parallel_rate: shares of them.
Examples:
    >>> metric = evaluate.load("metrics/parallelism")
    >>> metric.compute(predictions=[document], tokenizer="OWNER/NAME")["parallelism"]
"""
_CITATION = """\
@article{yang2025multiverse,
  title={Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation},
  author={Yang, Xinyu and An, Yuwei and Liu, Hongyi and Chen, Tianqi and Chen, Beidi},
  journal={arXiv preprint arXiv:2506.09991},
  year={2025}
}"""


class Parallelism(evaluate.Metric):
    """Counts tokens and positions of documents with a tokenizer."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2506.09991"],
        )

    def _compute(self, predictions, tokenizer):
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        tags = TagSet.from_tokenizer(tokenizer)
        measures = [measure_ids(tokenizer.encode(text, add_special_tokens=False), tags) for text in predictions]
        count = len(measures)
        return {
            "parallelism": sum(each.parallelism for each in measures) / count,
            "length": sum(each.length for each in measures) / count,
            "tokens": sum(each.num_tokens for each in measures) / count,
            "well_formed": sum(is_well_formed(text, tags.names) for text in predictions) / count,
            "parallel_rate": parallel_rate([_num_blocks(text, tags) for text in predictions]),
        }


def _num_blocks(text, tags):
    """Count the blocks of a document; of one that does not parse the goals that are closed, each of which forks."""
    try:
        return sum(1 for _ in parse_document(text, tags.names).blocks())
    except DocumentError:
        return text.count(tags.names.close("goal"))
