"""Former path of ``judging/verifier.py``, for programs that call :func:`~multiverse_hf.evaluation.answers.judge`."""

from multiverse_hf.judging.verifier import TIMEOUT_S, Verifier, VerifierError, VerifierTimeout

__all__ = ["TIMEOUT_S", "Verifier", "VerifierError", "VerifierTimeout"]
