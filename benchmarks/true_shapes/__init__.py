"""The whole path for a checkpoint of a real shape, each step watched from outside."""
