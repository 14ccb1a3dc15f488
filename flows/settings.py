"""Settings: `LOCKGATE_*` variables first, then `lockgate.toml` in the current folder, then defaults."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from policies import audit
from tasks.ports import BadInput


class Settings(BaseSettings):
    """Where this command finds its platform. The three addresses default to what `lockgate up` wrote down."""

    model_config = SettingsConfigDict(env_prefix="LOCKGATE_", toml_file="lockgate.toml", extra="forbid")

    home: Path = Field(Path("~/.lockgate"), description="Folder of the local platform: data, logs, sockets.")
    prefect_port: int = Field(4200, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    gateway_port: int = Field(8080, ge=1, le=65535)
    trigger_port: int | None = Field(None, ge=1, le=65535, description="Of the trigger receiver; any by default.")
    registry_poll_s: float = Field(10.0, gt=0, description="How often the registry is looked at without a hint.")
    mlflow_url: str | None = Field(None, description="An MLflow server elsewhere.")
    prefect_url: str | None = Field(None, description="A Prefect server elsewhere.")
    database: str | None = Field(
        None, description="URL of a PostgreSQL server for Prefect, MLflow and the ledger; SQLite in `home` by default."
    )
    ledger_url: str | None = Field(None, description="SQLAlchemy URL of the ledger; in `database` by default.")
    policies: Path | None = Field(None, description="Folder of the policies known by name; `home`/policies by default.")
    deliveries_at_once: int = Field(8, ge=1, description="Deliveries that the worker runs at once; others wait.")
    monitor_cron: str = Field("7 * * * *", description="When `monitor` runs; it looks at the models that are due.")
    evidently_port: int | None = Field(None, ge=1, le=65535, description="Port of Evidently's UI; none by default.")

    user: str | None = Field(None, description="Who you are on the record; the operating system's user by default.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def person(self) -> str:
        """Who gives orders and approvals here."""
        try:
            return audit.clean_name(self.user or getpass.getuser())
        except (KeyError, OSError):  # in a container that runs under any number, users have no names
            return f"uid {os.getuid()}"

    @property
    def folder(self) -> Path:
        """Where everything is kept; one folder has one name here, however it is reached."""
        try:
            return self.home.expanduser().resolve()
        except RuntimeError as exc:
            raise BadInput(f"the folder {self.home} cannot be told: {exc} Set LOCKGATE_HOME to a whole path") from exc

    @property
    def shelf(self) -> Path:
        """Where the platform's own policies lie."""
        return self.policies.expanduser().absolute() if self.policies else self.folder / "policies"

    def variables(self) -> dict[str, str]:
        """The settings as `LOCKGATE_*` variables, for processes that find no `lockgate.toml`."""
        set_here = self.model_dump(mode="json", exclude_none=True)
        return {f"LOCKGATE_{name.upper()}": str(value) for name, value in set_here.items()} | {
            "LOCKGATE_HOME": str(self.folder),
            "LOCKGATE_POLICIES": str(self.shelf),
        }


def read_settings() -> Settings:
    """The settings as they are now. Raises BadInput where a variable or `lockgate.toml` cannot be used."""
    try:
        return Settings()
    except ValidationError as exc:
        told = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors())
        raise BadInput(f"the settings (LOCKGATE_* variables, lockgate.toml) cannot be used: {told}") from exc
    except (OSError, ValueError) as exc:
        raise BadInput(f"{Path('lockgate.toml').absolute()} cannot be read: {exc}") from exc
