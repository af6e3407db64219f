"""The commands of `obc-deploy`: each one parses, calls and prints.

Nothing here imports torch or a runtime before a command that needs it runs.
"""
