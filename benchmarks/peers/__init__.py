"""Side by side with RecBole, RecTools and RePlay, by one command: ``python -m benchmarks.peers --help``.

``environments`` installs each peer by itself, from the pinned files in ``requirements/``. ``runs`` names what is
trained. ``runners/`` holds one script per library: it trains by that library's own means and writes scores. A script
imports nothing of ours but ``runners/shared.py``, since it runs in the peer's environment. ``ranking`` ranks the
scores of all of them in one way, ``records`` keeps the results, and ``page`` writes what is printed about them.
"""
