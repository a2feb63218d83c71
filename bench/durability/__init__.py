"""What losses of power, kills and damage leave: campaigns that are too long for tests."""
