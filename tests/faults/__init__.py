"""Random faults and bad input, each tried on the command line in a process of its own.

    python -m tests.faults --minutes=10 --seed=1
    python -m tests.faults --only=images:10007      repeats one case

A case is clean if the process ends within its limits of memory and time, and either succeeds or
prints one line on stderr and exits with a documented code. It is silent, the worst verdict, if the
process succeeds with other parameters than an undisturbed one.
"""
