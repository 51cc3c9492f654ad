"""The experiments of Faasm (USENIX ATC'20) on slosched's own functions, state and engines.

Nothing here is Faasm. Its Faaslet, a WebAssembly module, is replaced by a warm slot: a process of a worker that
serves one call after another. Its container is replaced by a process per instance.
"""
