"""The paper's study (Du et al., SIGIR 2023, Section 4) by one command: ``python -m benchmarks.paper --help``.

``published`` holds the paper's numbers, ``recipes`` what a run is and the settings that were found best, ``tables``
which runs each table and figure needs, ``train`` one run, ``analysis`` the tests and decompositions, ``store`` the
finished runs, ``report`` what is written about them.
"""
