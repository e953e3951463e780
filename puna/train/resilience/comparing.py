"""Do the ranks agree? What must be the same on several of them is compared, and who differs is found.

agree      loss and norm, before each update: they are of all ranks, so all must have the same
compare    the weights of replicas, every few steps, by the hashes of their states
"""

from puna.errors import PunaError
from puna.planner.policies import Verdict
from puna.train.resilience.peers import Peers
from puna.train.resilience.replicas import Comparison, Trial, earliest, outliers
from puna.train.resilience.telling import Telling

_MADE_AGAIN = "made again, it comes out differently"


class Comparing:
    """One rank's view. All ranks call the same methods together and come to the same verdict."""

    def __init__(self, peers: Peers, tell: Telling, *, most: int):
        self.peers, self.tell, self.most = peers, tell, most
        self.trial = Trial()
        self.repeating: int | None = None  # a step that is computed once more
        self.doubted: list[int] = []  # ranks whose numbers differed from the others' in the step that is repeated

    def agree(self, step: int, loss: float, norm: float) -> Verdict | None:
        """Where a rank has another loss or norm, its gradients are its own.

        The weights are still right then, and the step is computed once more. If that does not help, they are not.
        """
        said = self.peers.words(loss, norm)
        if len(set(said)) == 1:
            self.tell.accuse(self.doubted, step, _MADE_AGAIN)
            self.doubted = []
            return None
        self.doubted = outliers(said) or []
        whose = f"wrong: rank {', '.join(map(str, self.doubted))}" if self.doubted else "nobody can say whose"
        why = f"the ranks have different losses or norms in step {step}; {whose}"
        self.tell.say(why)
        self.tell.ledger("fault", kind="corruption", rank=(self.doubted or [None])[0], step=step, why=why)
        if self.repeating != step:
            self.repeating = step
            return Verdict(action="again", why=why)
        self.repeating = None
        return self._back(step, why)

    def compare(self, key: tuple[int, int], digest: str) -> Verdict | None:
        """The replicas' states `key`, of which this rank's has the hash `digest`: None if they are equal."""
        step = key[1]
        wrong = Comparison(key=key, hashes=self.peers.gather(digest), parts=self.peers.all_parts).wrong()
        if wrong == []:
            if self.trial.times and self.trial.first:  # on all ranks or on none
                first = earliest(self.peers.gather(self.trial.first_difference()))
                self.tell.accuse(first, step, _MADE_AGAIN)
            self.trial.end()
            return None
        whose = "nobody can say whose yet" if wrong is None else f"wrong: rank {', '.join(map(str, wrong))}"
        self.tell.say(f"replicas differ after step {step}; {whose}; making the steps since the last comparison again")
        why = f"replicas differ; {whose}"
        self.tell.ledger("fault", kind="corruption", rank=(wrong or [None])[0], step=step, why=why)
        return self._back(step, f"replicas differ after step {step}")

    def _back(self, step: int, why: str) -> Verdict:
        """To a state on which all agreed, and the same data again; raises where that has been tried."""
        times = self.trial.begin(step)
        if times > self.most:
            hint = "take that machine out of the run: its arithmetic is not reliable"
            raise PunaError(f"step {step} came out differently on the replicas {times} times: {why}", hint=hint)
        return Verdict(action="roll_back", to=step - 1, pass_over=False, why=why)
