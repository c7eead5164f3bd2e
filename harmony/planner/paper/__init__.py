"""The original Harmony (PVLDB 15(11), 2022): its profiles, its estimator, its decision space."""
