"""Layer 2: functions that turn answers into numbers."""
