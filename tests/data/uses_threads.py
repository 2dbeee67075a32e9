"""A handler that uses threads and what is built on them, imported when they are needed."""


def handle(text):
    import concurrent.futures
    import logging
    import subprocess
    import threading

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        doubled = "".join(pool.map(lambda character: 2 * character, text))
    logging.getLogger().warning("logged")
    told = subprocess.run(["echo", doubled], capture_output=True, text=True, check=True).stdout.strip()
    alone = threading.enumerate() == [threading.current_thread()] == [threading.main_thread()]
    return f"{told} {alone}"
