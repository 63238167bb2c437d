"""What this code needs, said before anything else fails: a checkpoint brings it to machines with any transformers."""

from transformers.utils.versions import require_version

# The oldest and the newest release that tests/test_fresh_environment.py runs are the ends of this range.
TRANSFORMERS = ("transformers>=5.17.0", "transformers<6")

for _requirement in TRANSFORMERS:
    require_version(_requirement, "Models that write in parallel need it: pip install 'transformers>=5.17,<6'")
