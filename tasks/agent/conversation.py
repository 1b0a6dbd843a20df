"""The messages of one rollout as they are sent next, and what gives way when they no longer fit the model's context."""

from collections.abc import Iterable, Sequence

from tasks.agent.message import PLACEHOLDER, Image, images_of
from tasks.agent.observation import PageText, as_text
from tasks.agent.protocol import WireMessage
from tasks.config import Agent


class Conversation:
    """A conversation. A message never changes: one that is to say something else is another, in its place."""

    def __init__(self, messages: Iterable[WireMessage], settings: Agent, page_text: PageText) -> None:
        self.messages = list(messages)
        self._settings, self._page_text = settings, page_text
        self._texts: list[tuple[int, str]] = []  # index of a message, and the text that stands in it for an image

    def add(self, messages: Sequence[WireMessage], images: Sequence[Image] = ()) -> None:
        """Append messages, in whose texts the images stand, in their order."""
        left = list(images)
        for message in messages:
            shown = [left.pop(0) for _ in range(message["content"].count(PLACEHOLDER))]
            self.messages.append({**message, "images": shown} if shown else message)

    def give_way(self) -> int | None:
        """Make the conversation shorter.

        The oldest image goes first, and its page's text is shown in its place, where that was not shown beside it. Once no
        image is left these texts go, too, the oldest first, so that only the pages' names remain.

        Returns:
            How many images were taken out, 1 or 0; None when nothing is left that may go.
        """
        for at, message in enumerate(self.messages):
            if images := images_of(message):
                text = "" if self._settings.observation == "both" else self._text(images[0])
                self._replace(at, PLACEHOLDER, text, images[1:])
                if text:
                    self._texts.append((at, text))
                return 1
        if self._texts:
            self._replace(*self._texts.pop(0), "", [])
            return 0
        return None

    def _text(self, image: Image) -> str:
        return as_text(self._page_text(image["file"], image["page"]), self._settings)

    def _replace(self, at: int, old: str, new: str, images: Sequence[Image]) -> None:
        """Put `new` in place of `old`, which stands on lines of its own; without `new` these lines go."""
        message = self.messages[at]
        content = message["content"]
        content = content.replace(f"\n{old}\n", f"\n{new}\n" if new else "\n", 1)
        rest = {name: value for name, value in message.items() if name != "images"}
        self.messages[at] = {**rest, "content": content} | ({"images": list(images)} if images else {})
