"""The command line of attnlab: flags, modes, sweeps, sampling and reports."""
