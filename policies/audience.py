"""Who meets the candidate: by chance (the same at every request of theirs), always, or not before it is proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from policies.traffic import KEY_HEADER, RULED_VALUES_MAX, TENANT_HEADER, Key, Rule


def _header(name: str) -> str:
    return Key("header", name).name.lower()


def _cookie(name: str) -> str:
    return Key("cookie", name).name


def _distinct(headers: object) -> object:
    if isinstance(headers, dict):
        lower = [str(name).lower() for name in headers]
        twice = [name for name in lower if lower.count(name) > 1]
        if twice:
            raise ValueError(f"header '{twice[0]}' is named twice: upper and lower case are one in HTTP")
    return headers


_Header = Annotated[str, AfterValidator(_header)]
_Values = tuple[str, ...]
_Headers = Annotated[dict[_Header, Annotated[_Values, Field(min_length=1)]], BeforeValidator(_distinct)]


class Matching(BaseModel):
    """Requests, by whose they are or by any header. One value that fits is enough."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: _Values = Field((), description="Values of `user_header`, or of `user_cookie`.")
    tenants: _Values = Field((), description="Values of `tenant_header`.")
    headers: _Headers = Field({}, description="Header: its values.")


class Audience(BaseModel):
    """Who meets the candidate: by chance, always, or never while it is a candidate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_header: _Header = Field(KEY_HEADER, description="Requests with the same value get the same version.")
    user_cookie: Annotated[str, AfterValidator(_cookie)] | None = Field(
        None, description="A cookie that says so instead of the header."
    )
    tenant_header: _Header = TENANT_HEADER
    always: Matching = Field(Matching(), description="To the candidate in every canary stage, whatever its weight.")
    never: Matching = Field(
        Matching(), description="Not to the candidate, not even as copies, before the rollout has ended."
    )

    @model_validator(mode="after")
    def _apart(self) -> Audience:
        if self.user_cookie is not None and self.user_header != KEY_HEADER:
            raise ValueError("a user is known by `user_header` or by `user_cookie`, not by both")
        if sum(len(rule.values) for rule in self.rules) > RULED_VALUES_MAX:
            raise ValueError(f"more than {RULED_VALUES_MAX} values in `always` and `never` together")
        never = {(rule.key, value) for rule in self._rules("stable") for value in rule.values}
        for rule in self._rules("candidate"):
            both = [value for value in rule.values if (rule.key, value) in never]
            if both:
                raise ValueError(f"'{both[0]}' is both in `always` and in `never`")
        return self

    @property
    def key(self) -> Key:
        """What keeps a user with one version."""
        return Key("header", self.user_header) if self.user_cookie is None else Key("cookie", self.user_cookie)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The exceptions, as the route carries them."""
        return (*self._rules("stable"), *self._rules("candidate"))

    def _rules(self, to: Literal["candidate", "stable"]) -> Iterator[Rule]:
        who = self.always if to == "candidate" else self.never
        if who.users:
            yield Rule(self.key, who.users, to)
        if who.tenants:
            yield Rule(Key("header", self.tenant_header), who.tenants, to)
        for name, values in who.headers.items():
            yield Rule(Key("header", name), values, to)
