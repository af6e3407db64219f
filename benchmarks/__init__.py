"""Measuring what compression was worth: timing, statistics, tables and the report."""
