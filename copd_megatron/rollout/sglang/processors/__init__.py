"""Processors that a server loads (SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE names this package). They run in the server."""
