"""Objectives of other papers, each in a room of its own."""
