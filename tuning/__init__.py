"""Measures plans, and learns from it.

- Tuning: ``tuner`` has a whole ``workload``, ``tuning_run`` its ``layers``, ``problem_race`` one problem: who takes
  part (``entrants``, ``rematch``), who is right (``gate``, ``hard_inputs``, ``isolation``), who is fastest (``race``,
  ``preference``, ``confirmation``), and whether others used the machine meanwhile (``busy``).
- Elsewhere and otherwise: ``cluster`` tunes on the machines of a Dask cluster, ``online`` on a program's own calls.
- What a program calls, to be tuned later: ``record``. What it may need, compiled ahead: ``warmup``.
- How good it all is: ``calibrate`` puts estimates right, ``validate`` puts choices to the test, ``bench`` compares with
  other engines.
"""
