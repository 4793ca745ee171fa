"""The record: tables, and the only place where transactions open. SQL never leaves this room."""
