"""Former path of :mod:`multiverse_hf.evaluation.lighteval.repair`, which an environment's hook may import."""

from multiverse_hf.evaluation.lighteval.repair import main, repair

__all__ = ["main", "repair"]

if __name__ == "__main__":
    main()
