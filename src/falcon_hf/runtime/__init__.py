"""The part of falcon_hf that runs at inference; the same flat files are copied into every drafter's Hub repo."""
