"""A model that does what it is told, however bad. Standard library only: it runs on the oldest Python, too."""

# ruff: noqa: T201, BLE001, S110, TRY002, PTH109
# Printing, swallowing and the rest of it are what it is for.

import os
import signal
import subprocess
import sys
import threading
import time


class Unruly:
    """`predict` takes ``[verb, argument]``."""

    def predict(self, order):
        return getattr(self, "do_" + order[0])(*order[1:])

    def do_echo(self, value=None):
        return value

    def do_print(self, text):
        print(text)
        print(text + " to stderr", file=sys.stderr)
        print(text + " without newline", end="")

    def do_pid(self):
        return os.getpid()

    def do_close_stdout(self):
        sys.stdout.close()
        sys.stderr = None

    def do_chdir(self, path):
        os.chdir(path)
        return os.getcwd()

    def do_exit(self):
        sys.exit("enough")

    def do_interrupt(self):
        raise KeyboardInterrupt

    def do_raise_base(self):
        raise BaseException("nobody catches me")

    def do_die(self, status):
        print("last words")
        os._exit(status)

    def do_raise(self, size):
        raise ValueError("x" * size)

    def do_loop(self):
        """Swallow every exception."""
        while True:
            try:
                while True:
                    time.sleep(0.01)
            except Exception:
                pass

    def do_swallow(self, times):
        """Swallow whatever there is to swallow, for a while."""
        for _ in range(times):
            try:
                while True:
                    time.sleep(0.01)
            except BaseException:
                pass
        return "too late"

    def do_steal_alarm(self):
        """Use the process's only timer, as a library with time limits of its own does."""
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1000)

    def do_own_alarm(self):
        """Set the timer to an earlier moment than the limit, and go on for ever."""
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        self.do_loop()

    def do_threads(self):
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(1000,)).start()
        return threading.active_count()

    def do_grandchild(self):
        """Start a process that would outlive everybody, and holds stdout."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid

    def do_fork(self):
        """Start a copy of this process, which ends by SIGTERM if nothing is wrong with its signals."""
        pid = os.fork()
        if pid == 0:
            time.sleep(1000)
        os.kill(pid, signal.SIGTERM)
        return os.WTERMSIG(os.waitpid(pid, 0)[1])

    def do_stray_fork(self):
        """Come back twice."""
        pid = os.fork()
        return pid and os.WEXITSTATUS(os.waitpid(pid, 0)[1])

    def do_fork_of_a_fork(self):
        """Return 0 if a file that a fork opened is still open in a fork of its own."""
        pid = os.fork()
        if pid == 0:
            opened = os.open(os.devnull, os.O_RDONLY)
            pid = os.fork()
            if pid == 0:
                os.fstat(opened)
                os._exit(0)
            os._exit(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
        return os.WEXITSTATUS(os.waitpid(pid, 0)[1])

    def do_wait_for_children(self):
        try:
            return os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return "none"

    def do_path(self):
        return sys.path

    def do_descriptors(self):
        """The descriptors that a child process would inherit."""
        return [fd for fd in range(3, 64) if _inheritable(fd)]

    def do_repeat(self, times):
        return "x" * times

    def do_shrink_frames(self, size):
        """A frame of the real limit would take all of the memory of a small machine."""
        sys.modules["_rq_models_host.frames"].MAX_FRAME = size


def _inheritable(fd):
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False
