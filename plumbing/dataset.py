"""Images of one split: an item is addressed by its position in the endless stream of training images."""

import multiprocessing
import random
import signal
import sys

import torch
from torch.utils.data import DataLoader, Dataset

from plumbing.errors import UserError, warn
from plumbing.images import BadImage
from plumbing.paths import shown
from plumbing.processes import mix, my_rows


class ImageData(Dataset):
    """Images of one split with their labels. Sub-classes give `__len__`, `labels`, `name` and `render`.

    class_names: [] where the images carry no labels.
    An image that cannot be read is replaced by the next one that can, wherever it is asked for: order and
    crops of all others stay as they are. `bad_list` is the file that names the bad ones, or None.
    """

    def __init__(self, image_size, seed, class_names):
        self.image_size, self.seed, self.class_names = image_size, seed, [*map(shown, class_names)]
        self.epoch, self.order, self.cache, self.replaced, self.bad_list = None, None, {}, {}, None

    @property
    def num_classes(self):
        return len(self.class_names)

    def readable(self, index):
        """The index itself, or that of the image which stands in for it; known once it was rendered."""
        while index in self.replaced:
            index = self.replaced[index]
        return index

    def label(self, index):
        """The label of what `pixels(index)` and `view(index)` gave."""
        return self.labels[self.readable(index)]

    def pixels(self, index):
        """(3, h, w) uint8 with short side `image_size`; small sets stay in memory after their first use."""
        pixels = None
        while pixels is None:
            index = self.readable(index)
            if index in self.cache:
                return self.cache[index]
            try:
                pixels = self.render(index)
            except BadImage as error:
                self.replace(index, error)
        if len(self) * pixels.numel() <= 2**30:
            self.cache[index] = pixels
        return pixels

    def replace(self, index, error):
        """Notes a bad image, and puts the next one in its place unless too many are bad."""
        self.replaced[index] = (index + 1) % len(self)
        line = shown(f"{self.name(index)}\t{error}").replace("\n", " ") + "\n"
        known = self.bad_list and self.bad_list.exists() and line.encode() in self.bad_list.read_bytes()
        if not known:
            warn(f"{self.name(index)} cannot be read ({error}); the next image takes its place")
            if self.bad_list is not None:
                with open(self.bad_list, "a", encoding="utf-8") as file:
                    file.write(line)
        if len(self.replaced) > min(max(10, len(self) // 20), len(self) - 1):
            raise UserError(f"{len(self.replaced)} of {len(self)} images cannot be read, the last one "
                            f"{self.name(index)} ({error}); is the data folder still there?", code=1)

    def view(self, index, crop_seed=None, flip=False):
        """One square crop: (3, S, S) uint8, at random with a `crop_seed`, else central."""
        pixels, S = self.pixels(index), self.image_size
        h, w = pixels.shape[1:]
        top, left = (h - S) // 2, (w - S) // 2
        if crop_seed is not None and (h, w) != (S, S):
            dice = random.Random(crop_seed)
            top, left = dice.randint(0, h - S), dice.randint(0, w - S)
        crop = pixels[:, top : top + S, left : left + S]
        return crop.flip(2) if flip else crop

    def shuffled(self, position):
        """Position in the endless stream of training images -> index; every epoch has its own permutation."""
        epoch, i = divmod(position, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        return int(self.order[i])

    def __getitem__(self, position):
        seed = mix(self.seed, "crop", position)
        index = self.shuffled(position)
        return self.view(index, seed, flip=seed % 2 == 1), self.label(index)


def batches(data, batch, start, workers, timeout=0):
    """Endless (images uint8, labels) of this process's share of each global batch, from step `start` on.

    timeout: seconds to wait for a worker, 0 for ever
    Closed, or left by an exception, it ends its workers; while a traceback holds its frame, `close` does.
    """

    def positions():
        for step in range(start, 2**62):
            rows = my_rows(batch)
            yield list(range(step * batch + rows.start, step * batch + rows.stop))

    loader = DataLoader(
        data, batch_sampler=positions(), num_workers=workers, pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=ignore_signals, timeout=timeout if workers else 0,
        generator=torch.Generator())  # so that it draws nothing from the global one
    before, stream, workers = multiprocessing.active_children(), None, []
    try:
        try:
            stream = iter(loader)
        finally:  # there may be some even if not all could be started
            workers = [child for child in multiprocessing.active_children() if child not in before]
        yield from stream
    except UserError as error:  # out of a worker it comes with the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1], code=1) from None
    finally:
        if workers and stream is not None:
            stream._shutdown_workers()  # what its __del__ calls: then torch takes no ended worker for a fault
        for worker in workers:  # those that are left ignore SIGTERM
            worker.kill()
            worker.join()


def ignore_signals(worker):
    """A signal to the whole process group must not take the loader from a process that still has to save."""
    for number in (*STOPS, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


STOPS = (  # signals after which a run saves and ends; those of closed terminals and schedulers are among them
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2)
