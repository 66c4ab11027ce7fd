"""The commands' exit codes: one meaning each, whichever command ends with it.

None of ours is 2: with that click ends what was typed and is no such command.
"""

#: Done; of ``bench``, a verdict, whatever it says.
DONE = 0
#: An error that is explained; of ``profile doctor``, something needs mending.
ERROR = 1
#: The time limit left problems untuned.
LEFT = 3
#: No backend could do some problem, or workers were lost; nothing to compare with; a target of ``--check`` was missed.
FAILED = 4
#: The machine is busy: nothing was measured, or there is no verdict.
BUSY = 5
#: By the user.
INTERRUPTED = 130
