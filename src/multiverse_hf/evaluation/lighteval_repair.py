"""The former name of :mod:`multiverse_hf.evaluation.lighteval.repair`, which environments may have installed."""

from multiverse_hf.evaluation.lighteval.repair import main, repair

__all__ = ["main", "repair"]

if __name__ == "__main__":
    main()
