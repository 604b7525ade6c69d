"""Whole answers as xgrammar's structural tags: what is held to rules, and the reasoning, messages and calls around it.

Compiles nothing.
"""
