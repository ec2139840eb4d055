"""What every program needs before it does its own work: who am I, how ranks find and watch each other, how a
process is told to stop, how errors end all ranks at once, how a trace is recorded.

In: the environment that a launcher made. Out: ranks, a process group, spans in RUN/trace, an exit code.
"""
