"""The program that runs one artifact in one runtime, in a process and an interpreter of its own.

It is started as a script (`python .../worker`) by `obc_deploy.runtimes.session`, needs only numpy
and the runtime itself, speaks the protocol of `worker_framing` on two pipes, and runs on
Python 3.8. Its modules carry the prefix `worker_` because the folder is the first entry of that
interpreter's search path: a file named like a runtime would hide the runtime.
"""
