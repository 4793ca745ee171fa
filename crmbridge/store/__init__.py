"""The record: tables, and the only place where transactions open. Rows never leave this room."""
