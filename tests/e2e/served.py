"""`octavo serve` with the shipped model, in a process of its own."""
import re
import subprocess
import threading

PROMPT = "The code of amber bell is 123456.\nQuestion: what is the code of amber bell?\nAnswer: "


class Server:
    def __init__(self, program, *flags):
        self.process = subprocess.Popen([program, "serve", "--port", "0", "--threads", "2", *flags],
                                        stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if match := re.search(r"(http://\S+)", line):
                self.url = match[1]
                break
        # The log goes on; nobody reads it, but somebody has to take it.
        self.log = threading.Thread(target=self.process.stderr.read, daemon=True)
        self.log.start()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) == 0, self.process.returncode
        self.log.join()
        self.process.stderr.close()
