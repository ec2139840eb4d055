"""What every program needs around its own work: this process's rank, the rendezvous of the ranks, their
heartbeats, clean stops on signals, errors that are printed once and end all ranks, the trace.

In: the environment that a launcher made. Out: ranks, a process group, spans in RUN/trace, an exit code.
"""
