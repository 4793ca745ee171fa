"""What was backed up, for whoever asks when the last good backup was."""

from peewee import Database
from playhouse.migrate import SchemaMigrator


def up(migrator: SchemaMigrator, db: Database) -> None:
    db.execute_sql(
        """
        CREATE TABLE backups (                           -- the last backups, and the tries that failed
            position INTEGER PRIMARY KEY AUTOINCREMENT,
            began_at TEXT NOT NULL,                      -- what was acknowledged before is in it
            ended_at TEXT NOT NULL,
            file     TEXT NOT NULL,
            bytes    INTEGER,
            error    TEXT                                -- NULL: it was made and verified
        )""".strip()
    )
