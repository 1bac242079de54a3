"""
The talk's claims about thinking, tools, letters and reinforcement learning.
"""
