"""What the channel's whole language needs: when a customer last wrote, for the window in which we may answer."""

from peewee import Database
from playhouse.migrate import SchemaMigrator


def up(migrator: SchemaMigrator, db: Database) -> None:
    db.execute_sql("ALTER TABLE contacts ADD COLUMN last_wrote_at TEXT /* opens the window in which we may answer */")
