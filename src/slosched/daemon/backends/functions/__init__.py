"""The live runner of functions: a process for each unfinished call, forked from a template that ran `init`."""
