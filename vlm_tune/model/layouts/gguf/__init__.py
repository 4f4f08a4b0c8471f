"""The two files for llama.cpp-based engines."""
