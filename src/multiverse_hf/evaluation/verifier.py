"""The verifier, also under the name that programs which call :func:`~multiverse_hf.evaluation.answers.judge` use."""

from multiverse_hf.judging.verifier import TIMEOUT_S, Verifier, VerifierError, VerifierTimeout

__all__ = ["TIMEOUT_S", "Verifier", "VerifierError", "VerifierTimeout"]
