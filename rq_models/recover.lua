-- Put back what dead workers held: each run whose lease is gone ends here, and its job goes back to the front of the
-- queue without spending a retry. So do runs of the asking worker's own that it does not know of, because the answer
-- that told it of them was lost.
--
-- Only a death of a job that was in hand alone says something of that job: a recovered job is taken alone (its field
-- `deaths` is there), and when so many workers have died of it, it is handed to the asking worker, who fails it.
--
-- KEYS  1 rq:wip zset, 2 queue list, 3 list of jobs that were handed from the queue's front to workers that waited; one
--       is left there only by a worker that was cut off before its take
-- ARGV  1 RQ's key prefix, 2 prefix of the keys of leases, 3 the asking worker's lease, 4 its name, 5 time now as RQ
--       writes it, 6 when runs count as abandoned to RQ, in seconds, 7 deaths that are too many, 8 number of the first
--       execution, 9 whether leases that are gone count; then its own runs that it knows of, as members of rq:wip, and
--       leases of workers that are known to be dead
-- Returns how many were put back, and of those to be failed a list of {job id, execution id, values of the fields read,
-- the whole hash}.
local call, pcall, match = redis.call, redis.pcall, string.match
local prefix, mine, worker, now, ends, most = ARGV[1], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local in_hand, alive = {}, {[mine] = false}
for n = 10, #ARGV do
  if string.find(ARGV[n], ':', 1, true) then
    in_hand[ARGV[n]] = true
  else
    alive[ARGV[n]] = false
  end
end
while type(pcall('LMOVE', KEYS[3], KEYS[2], 'RIGHT', 'LEFT')) == 'string' do end
local lost = {}
local members = pcall('ZRANGE', KEYS[1], 0, -1)
if members['err'] then
  return redis.error_reply('WRONGTYPE ' .. KEYS[1] .. ' is no sorted set; delete it')
end
if type(pcall('LLEN', KEYS[2])) == 'table' then
  return redis.error_reply('WRONGTYPE ' .. KEYS[2] .. ' is no list; delete it')
end
for _, member in ipairs(members) do
  -- Runs of a stock worker have other names, and are RQ's own to clean up.
  local id, lease, number = match(member, '^([%w_-]+):(%x+)-(%d+)$')
  if id and #lease == $LEASE_LENGTH and not in_hand[member] then
    if alive[lease] == nil then
      alive[lease] = ARGV[9] == '0' or call('EXISTS', ARGV[2] .. lease) == 1
    end
    if not alive[lease] then
      lost[#lost + 1] = {id = id, member = member, execution = lease .. '-' .. number, lease = lease,
        number = tonumber(number)}
    end
  end
end
-- The last first: each goes to the front.
table.sort(lost, function(a, b)
  if a.lease ~= b.lease then return a.lease < b.lease end
  return a.number > b.number
end)
local back, poison = 0, {}
for _, run in ipairs(lost) do
  local job, record = prefix .. ':job:' .. run.id, prefix .. ':execution:' .. run.member
  local was = pcall('HMGET', record, 'worker_name', 'alone')
  call('ZREM', KEYS[1], run.member)
  call('DEL', record)
  pcall('ZREM', prefix .. ':executions:' .. run.id, run.execution)
  if was[1] then
    pcall('SREM', prefix .. ':worker:' .. was[1] .. ':executions', run.member)
  end
  local values = pcall('HMGET', job, 'status', 'deaths')
  -- Cancelled or deleted meanwhile: then there is nothing to put back.
  if values[1] == 'started' then
    local died = run.lease ~= mine
    local deaths = died and (tonumber(values[2]) or 0) + (was[2] and 1 or 0) or values[2]
    if died and deaths >= most then
      local execution = mine .. '-' .. (tonumber(ARGV[8]) + #poison)
      call('HSET', job, 'deaths', deaths, 'worker_name', worker)
      call('ZADD', KEYS[1], ends, run.id .. ':' .. execution)
      poison[#poison + 1] = {run.id, execution, call('HMGET', job, 'data', 'attempts', 'deaths', $FIELDS),
        call('HGETALL', job)}
    else
      call('HSET', job, 'status', 'queued', 'enqueued_at', now)
      if deaths then
        call('HSET', job, 'deaths', deaths)
      end
      call('LPUSH', KEYS[2], run.id)
      back = back + 1
    end
  end
end
return {back, poison}
