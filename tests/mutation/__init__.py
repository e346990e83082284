"""Mutation testing: seeded faults in the library, and which test notices each of them.

    make mutants                     # 60 faults, seed 0, in a copy of this tree; resumes where it stopped
    make mutants COUNT=20 SEED=3     # others
    PYTHONPATH=tests python -m mutation.run --list
    PYTHONPATH=tests python -m mutation.run --only 1a2b3c4d
    PYTHONPATH=tests python -m mutation.run --tree OTHER_CHECKOUT --sample tests/mutation/sample.json

`edits` splices text, `operators` knows the kinds of faults, `sites` finds where they fit, `sampling` draws some and
finds them again in another tree, `killers` names the test modules, `trial` runs them on one fault, `run` is the
command. `equivalent.toml` lists faults that change no result, `sample.json` the faults that were compared before and
after a change of the tests.
"""
