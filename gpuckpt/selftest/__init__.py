"""`gpuckpt selftest`: whether a directory's file system keeps what gpuckpt relies on."""
